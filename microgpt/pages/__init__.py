"""Pages to look at: each one HTML file that needs no network, no server and no script."""
