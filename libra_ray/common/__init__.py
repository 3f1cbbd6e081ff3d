"""Small helpers without a domain: files, JSON, progress, provenance. Standard library and tqdm only."""
