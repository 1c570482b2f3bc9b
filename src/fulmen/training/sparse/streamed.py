"""Rows of a stream by number, as Trainer asks for them, and the position in the stream at each checkpoint."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fulmen.data import SequenceStream, TokenSequence
from fulmen.training.rows import target_row


class StreamedRows:
    """The first `count` sequences of an endless stream as rows; to be asked for in order.

    Every process reads the whole stream and takes the rows of its own numbers, so that many processes see
    the rows that one would see.

    Args:
        ahead: rows that may be read before the one whose position is asked for.
        n_targets: as `target_row`.
    """

    def __init__(self, stream: SequenceStream, count: int, ahead: int, n_targets: int | None = None) -> None:
        self.stream, self.count, self.ahead, self.n_targets = stream, count, ahead, n_targets
        self.sequences = self._endless()
        self.positions = {0: stream.state_dict()}
        self.n_read = 0
        self.row: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        assert number >= self.n_read - 1, f"row {number} was asked for after row {self.n_read - 1}"
        self._read_before(number + 1)
        return self.row

    def state_dict(self, number: int) -> dict[str, Any]:
        """The position before row `number`."""
        # The last rows before it may be those of other processes.
        self._read_before(number)
        return {"number": number, "stream": self.positions[number]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the row that a position lies before."""
        self.stream.load_state_dict(state["stream"])
        self.sequences = self._endless()
        self.n_read = state["number"]
        self.positions = {self.n_read: state["stream"]}

    def _read_before(self, number: int) -> None:
        while self.n_read < number:
            self.row = target_row(next(self.sequences), self.n_targets)
            self.n_read += 1
            self.positions[self.n_read] = self.stream.state_dict()
            self.positions.pop(self.n_read - self.ahead - 1, None)

    def _endless(self) -> Iterator[TokenSequence]:
        while True:
            yield from self.stream
