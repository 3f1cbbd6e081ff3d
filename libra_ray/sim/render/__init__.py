"""Pictures from MuJoCo without a screen."""
