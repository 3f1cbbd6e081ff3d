"""Reports, pages, tables and plots of runs, sweeps and studies."""
