"""What a million tokens cost against position, dense and with DSA. Loads no weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fulmen.errors import unwritable
from fulmen.evaluation.price.plot import png_bytes, price_csv, price_dict, price_plot
from fulmen.evaluation.price.prices import (
    KINDS,
    Machine,
    Measured,
    ModelShape,
    PriceRow,
    Pricing,
    Roofline,
    Terms,
    curve_positions,
)
from fulmen.evaluation.price.speed import Speed, measure_speed, measured_positions
from fulmen.evaluation.provenance import about_run
from fulmen.evaluation.report_files import write_json
from fulmen.files import write_file
from fulmen.pipeline.cost_settings import CostSettings
from fulmen.pipeline.describe import read_shape
from fulmen.pipeline.reporter import Reporter


class PriceRun(NamedTuple):
    """A curve with all that it was made from; `speed` is None where nothing was measured."""

    settings: CostSettings
    pricing: Pricing
    speed: Speed | None
    rows: list[PriceRow]
    crossovers: dict[str, int | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        shape = self.pricing.shape
        return {
            "about": about_run(self.settings.source),
            "dsa": shape.dsa.to_dict(),
            "dtype": str(shape.dtype).removeprefix("torch."),
            "machine": asdict(self.pricing.machine),
            "terms": asdict(self.pricing.terms),
            "unit": "dollars per million tokens",
            "crossovers": self.crossovers,
            "rows": [price_dict(row) for row in self.rows],
            "measured": self.speed.to_dict() if self.speed else None,
        }

    def write(self, folder: Path) -> list[Path]:
        """Write cost.json, cost.csv and cost.png; return them. Raises OutputError."""
        plot = price_plot(self.rows, self.crossovers, self.speed.last_position if self.speed else None)
        return [
            write_json(self.to_dict(), folder / "cost.json"),
            write_file(folder / "cost.csv", price_csv(self.rows)),
            write_file(folder / "cost.png", png_bytes(plot)),
        ]


def price_model(settings: CostSettings, reporter: Reporter) -> PriceRun:
    """Price a model's tokens; writes nothing. Raises what its parts raise."""
    _, _, shape = read_shape(settings.source)
    speed = _measured(settings, shape, reporter) if settings.measure else None
    machine = speed.machine if speed else Machine(*settings.given_speed())
    attention = Measured(speed.lines) if speed else Roofline(machine)
    pricing = Pricing(shape, machine, attention, Terms(settings.price, settings.hit_rate, settings.batch))
    crossovers = {kind: pricing.cheaper_from(kind, settings.length) for kind in KINDS}
    rows = pricing.rows(curve_positions(shape.dsa, settings.length))
    return PriceRun(settings, pricing, speed, rows, crossovers)


def _measured(settings: CostSettings, shape: ModelShape, reporter: Reporter) -> Speed:
    positions = measured_positions(shape.dsa.topk, settings.length)
    try:
        # Said before minutes of measuring, not after.
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(settings.folder, error) from error
    with reporter.stage("Measure"):
        return measure_speed(shape, positions, progress=reporter.advance)
