"""The study of a trained pair of twins, measured through plain `transformers`, and its report."""
