"""Convert a dense model, then train all its weights under sparse attention on text of your own.

    python examples/train_on_own_data.py smollm2-135m --data my-texts/ --out out/mine --steps 48

The dense model teaches: the texts say where it is asked, not what is right (alpha=1). A part of them is held
out and tells which step is kept.
"""

import argparse
from pathlib import Path

import fulmen


def main(source: str, data: list[str], out: Path, topk: int, length: int | None, steps: int) -> None:
    """Both runs resume where they were interrupted, if this is called again."""
    reporter = fulmen.LineReporter()
    made = fulmen.convert(
        source,
        out=out / "inherited",
        topk=topk,
        stages=("inherit",),
        data=data,
        length=length,
        reporter=reporter,
    )
    trained = fulmen.train(
        made,
        out=out / "trained",
        data=data,
        length=length,
        steps=steps,
        checkpointing=True,
        reporter=reporter,
    )
    report = fulmen.evaluate(trained, dense=source, data=data, length=length, quick=True, reporter=reporter)
    print(report.to_markdown())
    print(f"wrote {trained.path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="a directory, a name on the Hugging Face hub, a .gguf file or smollm2-135m"
    )
    parser.add_argument("--data", nargs="+", default=[], help="files, directories, or hf:name")
    parser.add_argument("--out", type=Path, default=Path("out/mine"))
    parser.add_argument("--topk", type=int, default=256, help="keys that each query keeps")
    parser.add_argument("--length", type=int, help="tokens per sequence; more than topk")
    parser.add_argument("--steps", type=int, default=48, help="of the sparse stage, one sequence each")
    main(**vars(parser.parse_args()))
