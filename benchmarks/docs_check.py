"""Whether the documentation's generated tables and charts show their data: ``make docs-check``.

Writes nothing. Exits with 1 where a file is stale, with the command that writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks import compatibility, launch_plan, report, scaling_page, training_fold
from benchmarks.page import ROOT
from benchmarks.roofline_model import step
from resnet_fused.plan import plan
from tools import dependencies, kernel_instructions, reliability

PAGES = (
    *report.PAGES,
    compatibility.PAGE,
    launch_plan.PAGE,
    training_fold.PAGE,
    scaling_page.PAGE,
    kernel_instructions.PAGE,
    dependencies.PAGE,
    reliability.PAGE,
)


def readme_sentences() -> list[str]:
    """What README says in its text of the launches of ResNet-50."""
    passes = [p for p in plan("resnet50", 256, "bf16") if p.is_pass]
    eager = step("resnet50", 256, 224, "bf16", "eager")
    ours, theirs = (f"{sum(x.bytes for x in xs) / 256e6:.0f} MB" for xs in (passes, eager))
    return [
        f"takes {len(passes)} passes over activations that move {ours} per image in bf16",
        f"eager PyTorch takes {len(eager)} passes that move {theirs}",
    ]


def problems() -> Iterator[str]:
    for page in PAGES:
        try:
            yield from (f"{path.relative_to(ROOT)} is stale: run `{page.command}`" for path in page.stale())
        except ValueError as error:
            yield f"{page.path.relative_to(ROOT)}: {error}"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    yield from (f"README.md must say: {text}" for text in readme_sentences() if text not in readme)


if __name__ == "__main__":
    stale = list(problems())
    print("\n".join(stale) or "all pages show their data")
    sys.exit(1 if stale else 0)
