"""The data room: recorded episodes in, training batches out."""
