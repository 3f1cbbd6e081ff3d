"""Other servers around the same policy, and the policy without a server, each a process of its own."""
