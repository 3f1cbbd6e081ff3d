"""What a sweep found: records, plots, and the page."""
