"""Headline results of papers, measured on small networks beside the published figures.

A paper is a module with one constant ``PAPER``, entered in ``papers.py``::

    from pushforward.reproduce.data import Images
    from pushforward.reproduce.paper import Claim, Outcome, Paper, Progress, at_least

    @dataclass(frozen=True)
    class Settings:                      # every size: tests replace them by tiny ones
        steps: int = 2000

    def measure(images: Images, settings: Settings, progress: Progress) -> Outcome:
        ...                              # train and measure, for one seed
        progress(done, total)            # now and then, in any unit
        return Outcome({"norm none": 22.0, "norm penalised": 2.8}, drawn={"curve": ...})

    def figures(outcomes: Sequence[Outcome]) -> tuple[Picture, ...]:
        ...                              # report.canvas: draw, Picture; one outcome for each seed

    PAPER = Paper(
        name="the-word-on-the-command-line",
        title=..., authors=..., source="ICML 2011", summary="what is trained, and on what",
        data="digits",                   # or "mnist5k": what is taken where --data is not given
        settings=Settings(),
        quick=Settings(steps=50),        # for --quick
        measure=measure,
        figures=figures,
        claims=(
            Claim(
                text="The penalty lowers ||J|| at least threefold",
                published="32.9 to 1.1 (Table 1, MNIST, LeNet)",
                value=lambda numbers: numbers["norm none"] / numbers["norm penalised"],
                unit="times",
                criterion=at_least(3.0),
                shown=("norm none", "norm penalised"),
            ),
        ),
    )

``measure`` runs on one thread with torch's generators seeded, so that it draws from torch's default
generator and takes no seed of its own; the framework puts the generators back, and runs ``measure``
for each seed. ``Outcome.numbers`` are plain floats by name, all of which the page lists with mean
and spread; ``Outcome.drawn`` is whatever ``figures`` draws. A claim is about one number for each
seed, ``value`` of its outcome, and holds where the mean over seeds meets the criterion, which is
fixed in the code and comes from what the paper says. What is not a number meets none.
"""
