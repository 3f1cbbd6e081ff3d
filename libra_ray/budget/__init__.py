"""What each component of a checkpoint takes, and which settings fit a budget per control decision."""
