"""The headline numbers of a run, each with what it means, and the sites that drop."""

from gptlite.report.layout import Table, Tile
from gptlite.report.verdict import Verdict, nats
from gptlite.runs.results import RunFiles, generalisation_gap, number
from gptlite.terminal import format_duration


def tiles_of(run: RunFiles, verdict: Verdict | None) -> list[Tile]:
    """The gap is that of the verdict, where there is one."""
    best, evaluated = run.best, run.evaluations
    found = []
    if best is not None:
        about = f"nats per token, at step {best['step']:,}; lower is better"
        found.append(Tile("best validation loss", f"{best['val/loss']:.4f}", about))
        if best.get("val/bits_per_byte") is not None:
            about = "at the same step; comparable between tokenizers"
            found.append(Tile("bits per byte", f"{best['val/bits_per_byte']:.3f}", about))
        gap = generalisation_gap(evaluated[-1]) if verdict is None else verdict.gap
        if gap is not None:
            about = "nats, validation minus training text, dropout off on both, at step "
            about += f"{evaluated[-1]['step']:,}"
            found.append(Tile("gap to training text", nats(gap), about))
    seconds = number(run.rows[-1].get("elapsed_seconds")) if run.rows else None
    if seconds is not None:
        about = f"until step {run.rows[-1]['step']:,}, without evaluations"
        found.append(Tile("training time", format_duration(seconds), about))
    return found


def sites_table(run: RunFiles) -> Table:
    about = "Keyed masks are functions of seed, step, site, layer, sample, position and feature; "
    about += "native ones come from torch's generator."
    rows = [
        [site["site"], f"{site['rate']:g}", site.get("profile", ""), str(site.get("masks", ""))]
        for site in run.sites
        if site.get("rate")
    ]
    return Table("Sites that drop", ["site", "rate", "over depth", "masks"], rows, about)
