"""What a trained pair of twins can do, measured through plain `transformers`, and the report."""
