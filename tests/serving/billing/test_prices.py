"""Price tables: costs against fractions, rounding, and files that cannot be."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulmen.errors import ConfigError
from fulmen.serving.billing import prices
from fulmen.serving.billing.prices import (
    DEFAULT_PRICES,
    MAX_AMOUNT,
    MAX_RATE,
    Rates,
    Tokens,
    from_units,
    money_text,
    read_prices,
    rounded_text,
    to_units,
)

GOOD = 'currency = "CNY"\n[rates]\nhit = 0.2\nmiss = 2\noutput = 3\n'
rates = st.decimals(0, MAX_RATE, places=8)
counts = st.integers(0, 10**9)


def write(folder, text):
    file = folder / "prices.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_million_tokens_of_each_kind_cost_the_list_prices():
    million = 10**6
    for place, (ours, dense) in enumerate([("0.2", "0.5"), ("2", "4"), ("3", "12")]):
        tokens = Tokens(*(million * (place == kind) for kind in range(3)))
        assert DEFAULT_PRICES.cost(tokens) == Decimal(ours)
        assert DEFAULT_PRICES.dense_cost(tokens) == Decimal(dense)


@given(st.tuples(rates, rates, rates), st.tuples(counts, counts, counts))
def test_a_cost_is_the_exact_sum_rounded_once_half_up(rates, counts):
    exact = sum(Fraction(rate) * count for rate, count in zip(rates, counts, strict=True)) / 10**6
    cost = Rates(*rates).cost(Tokens(*counts))
    assert Fraction(cost) * 10**9 == (exact * 10**9 + Fraction(1, 2)) // 1
    assert cost.as_tuple().exponent == -9


def test_half_a_unit_rounds_up_and_the_sum_is_what_is_rounded():
    half = Decimal("0.0005")  # one token: half of 1e-9
    assert Rates(half, half, half).cost(Tokens(1, 0, 0)) == Decimal("1e-9")
    assert Rates(half, half, half).cost(Tokens(1, 1, 0)) == Decimal("1e-9")


def test_the_documented_file_is_the_default_table(tmp_path):
    documented = prices.__doc__.partition("TOML")[2].partition("\n\n")[2].partition("Rounding")[0]
    file = write(tmp_path, "\n".join(line.strip() for line in documented.splitlines()))
    assert read_prices(file) == DEFAULT_PRICES


def test_without_dense_rates_there_is_no_dense_cost(tmp_path):
    assert read_prices(write(tmp_path, GOOD)).dense_cost(Tokens(1, 2, 3)) is None


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('currency = "CNY"', "", "currency is None"),
        ('"CNY"', '"yuan"', "currency is 'yuan'"),
        ("miss = 2\n", "", "rates.miss is missing"),
        ("0.2", "-0.2", "rates.hit is -0.2"),
        ("0.2", "nan", "rates.hit is NaN"),
        ("0.2", "inf", "rates.hit is Infinity"),
        ("0.2", "true", "rates.hit is True"),
        ("0.2", '"0.2"', "rates.hit is '0.2'"),
        ("0.2", "1000001", "rates.hit is 1000001"),
        ("hit", "cached", "rates.cached is unknown"),
        ("[rates]", "[rate]", "rate is unknown"),
        ("output = 3", "output = 3\n[dense]\nhit = 1\nmiss = 1", "dense.output is missing"),
        ("[rates]\nhit = 0.2\nmiss = 2\noutput = 3", "rates = 2", r"\[rates\] is missing"),
        ("[rates]", "[rates", "no TOML"),
    ],
)
def test_a_bad_file_is_refused_by_its_key(tmp_path, old, new, named):
    assert old in GOOD
    with pytest.raises(ConfigError, match=named) as refused:
        read_prices(write(tmp_path, GOOD.replace(old, new)))
    assert "prices.toml" in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml cannot be read"):
        read_prices(tmp_path / "gone.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no TOML"):
        read_prices(tmp_path / "binary.toml")


@given(st.decimals(0, MAX_AMOUNT, places=9))
def test_amounts_survive_units_and_text(amount):
    assert from_units(to_units(amount)) == amount
    text = money_text(amount)
    assert Decimal(text) == amount
    assert set(text) <= set("0123456789.")


@pytest.mark.parametrize("amount", ["-1", "1e-10", "NaN", "sNaN", "Infinity", "1000000000.1", "1e999999"])
def test_amounts_that_no_ledger_holds_are_refused(amount):
    with pytest.raises(ConfigError, match="amount"):
        to_units(Decimal(amount))


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("-0.001", "0.00"),
        ("-0.005", "0.00"),
        ("-0", "0.00"),
        ("0.004", "0.00"),
        ("-0.006", "-0.01"),
        ("5", "5.00"),
    ],
)
def test_a_balance_in_two_decimals_is_never_minus_nothing(amount, text):
    assert rounded_text(Decimal(amount)) == text
    assert money_text(Decimal(amount)) == {"-0": "0"}.get(amount, amount)
