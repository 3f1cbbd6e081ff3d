"""When to plan, which intent is current, and what to do when it is late."""
