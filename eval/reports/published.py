"""Numbers that others printed, for a table of their own: other splits, other recipes, no floor. Never beside ours."""

PUBLISHED_NOTE = (
    "As published, another protocol: these numbers come from the paper's own tables. Its recipe, number of cells and "
    "test cells are not all known, so no number here can be compared with one above."
)
# data set, as a word of its name -> (source, metric columns, rows)
PUBLISHED: dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "dentate": (
        "Discrete Cell Models, Table 1 (dentate gyrus, unconditional)",
        ("W2", "MMD² RBF"),
        (
            ("scDiffusion", "17.321 ± 0.041", "0.689 ± 0.000"),
            ("CFGen", "11.608 ± 0.066", "0.075 ± 0.000"),
            ("scLDM", "10.615 ± 0.028", "0.102 ± 0.003"),
            ("DCM (5M)", "5.913 ± 0.091", "0.019 ± 0.005"),
        ),
    ),
    "replogle": (
        "Discrete Cell Models, Table 2 (Replogle, perturbations)",
        ("W2", "MMD² RBF"),
        (
            ("scVI", "17.359 ± 0.051", "0.453 ± 0.003"),
            ("CPA", "11.510 ± 0.029", "0.532 ± 0.003"),
            ("scGPT", "34.166 ± 0.272", "3.087 ± 0.010"),
            ("STATE", "20.58 ± 0.039", "0.730 ± 0.003"),
            ("scLDM (ω = 1)", "11.292 ± 0.033", "0.200 ± 0.002"),
            ("scLDM (ω = 5)", "12.900 ± 0.069", "0.320 ± 0.004"),
            ("scLDM (ω = 10)", "14.911 ± 0.091", "0.436 ± 0.005"),
            ("DCM (20M)", "10.03 ± 0.337", "0.688 ± 0.099"),
            ("DCM (10M), K562 only", "7.284 ± 0.091", "0.605 ± 0.005"),
        ),
    ),
}
