"""The gateway and the replicas' work, without an engine."""
