"""The ledger's tables. Amounts are whole numbers of 1e-9 of the currency, times milliseconds since 1970."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
)

VERSION = 1

metadata = MetaData()

# One row.
book = Table(
    "book",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("currency", Text, nullable=False),
)

# The balance is the sum of deposits minus that of charges, kept here so that `begin` need not add them up.
accounts = Table(
    "accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("balance", BigInteger, nullable=False),
    Column("prepaid", Boolean, nullable=False),
)

deposits = Table(
    "deposits",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("account", Text, ForeignKey("accounts.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("note", Text, nullable=False),
    Column("made_ms", BigInteger, nullable=False),
)

requests = Table(
    "requests",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account", Text, ForeignKey("accounts.id"), nullable=False),
    Column("server", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("begun_ms", BigInteger, nullable=False),
    Column("settled_ms", BigInteger),
    Column("state", Text, nullable=False),
    Column("outcome", Text),
    Column("hit", BigInteger, nullable=False, server_default="0"),
    Column("miss", BigInteger, nullable=False, server_default="0"),
    Column("output", BigInteger, nullable=False, server_default="0"),
    # Decimal text, per million tokens: the prices at the time the request began.
    Column("rate_hit", Text, nullable=False),
    Column("rate_miss", Text, nullable=False),
    Column("rate_output", Text, nullable=False),
    Column("charge", BigInteger),
    Column("context_tokens", BigInteger),
    Column("tokens_read", BigInteger),
    Column("bytes_saved", BigInteger),
    CheckConstraint("(state = 'open' AND charge IS NULL) OR (state = 'settled' AND charge IS NOT NULL)"),
    Index("requests_by_time", "begun_ms"),
    Index("requests_by_account", "account", "begun_ms"),
    Index("requests_by_state", "state"),
)
