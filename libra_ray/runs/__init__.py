"""A run's folder, its records, and MLflow."""
