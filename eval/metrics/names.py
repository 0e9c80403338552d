"""What a reader sees of a metric or a model, in every table, figure and card: results.json has the short names."""

BANDS = ("1", "2-5", "6-10", "11-20", "21-40")  # of components
VCC2026_NAMES = {
    "pds_cosine": ("discrimination (PDS, cosine)", "↑"),
    "expr_mse_unbiased_capped_norm": ("error of expression", "↓"),
    "de_wilcoxon_direction_fidelity_yield_raw": ("direction fidelity", "↑"),
    "de_wilcoxon_direction_reach_raw": ("direction reach", "↑"),
    "de_wilcoxon_sig_jaccard": ("overlap of differential genes (Jaccard)", "↑"),
    "de_wilcoxon_lfc_nmae": ("error of fold changes", "↓"),
}
METRIC_NAMES = {  # label, and which way is better
    "mmd2": ("MMD²", "↓"),
    "w2": ("W2", "↓"),
    "w2_gaussian": ("W2, Gaussian", "↓"),
    "correlation_pearson": ("gene-gene correlation", "↑"),
    "correlation_slope": ("slope of gene-gene correlations", "→ 1"),
    "mean_r2": ("R² of means", "↑"),
    "variance_r2": ("R² of variances", "↑"),
    "zero_fraction_error": ("zero-fraction error", "↓"),
    "library_size_cv_ratio": ("library-size CV ratio", "→ 1"),
    "nearest_neighbour_accuracy": ("1-NN accuracy", "→ 0.5"),
    "nearest_neighbour_accuracy_real": ("1-NN accuracy, real cells", "→ 0.5"),
    **{f"component_variance_{band.replace('-', '_')}": (f"variance of components {band}", "→ 1") for band in BANDS},
    "nearest_training_distance_ratio": ("distance to training cells", "→ 1"),
    "pearson_delta": ("Pearson delta", "↑"),
    "overlap_at_N": ("overlap of differential genes (DES)", "↑"),
    "discrimination_score_l1": ("discrimination of perturbations (PDS)", "↑"),
    "mae": ("mean absolute error", "↓"),
    "differential_genes": ("differential genes", ""),
    "differential_genes_real": ("differential genes, real cells", ""),
    **VCC2026_NAMES,
    **{f"score_{name}": (f"score: {label}", "↑") for name, (label, _) in VCC2026_NAMES.items()},
    "score": ("score: mean of the six", "↑"),
}


def metric_label(metric: str) -> tuple[str, str]:
    """Return a metric's name in a table, and which way is better (empty where that is not known)."""
    return METRIC_NAMES.get(metric, (metric, ""))


def model_label(model: str) -> str:
    """Return a model's name in a table: ``independent_marginals`` in words."""
    return model.replace("_", " ")
