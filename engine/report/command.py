"""`mentorch report`."""

from pathlib import Path

from tyro.conf import Positional


def report(
    run: Positional[Path],
    *,
    out: Path | None = None,
    samples: int = 60,
    index: Path | None = None,
) -> None:
    """Say which labels of a run's training set are most likely wrong.

    Writes sample_scores.parquet, a row a sample, and report.html, a page to look at.

    Args:
        run: the run folder.
        out: folder of both files; by default RUN/report.
        samples: how many of the most suspicious samples the page shows.
        index: the training index, if it or its images are elsewhere now.
    """
    # Here, so that --help is there at once: torch, matplotlib and scikit-learn take seconds.
    from mentorch.engine.data.index import replacing
    from mentorch.engine.data.readers import open_reader
    from mentorch.engine.report.page import render_page
    from mentorch.engine.report.run_folder import read_run
    from mentorch.engine.report.scores import print_top, score_samples, write_scores

    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    found = read_run(run, index)
    scores = score_samples(found.ledger, found.index)
    page = render_page(found, scores, open_reader(found.index), samples)
    folder = out if out is not None else run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_scores(scores, folder / "sample_scores.parquet")
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    suspects = int(scores["suspect"].to_numpy().sum())
    print(f"{folder / 'sample_scores.parquet'}: {len(scores):,} samples, {suspects:,} suspects")
    print(f"{folder / 'report.html'}")
    print_top(scores, "loss_mean")
