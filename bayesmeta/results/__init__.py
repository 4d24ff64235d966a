"""What the user holds: posteriors, predictions, files on disk and the export to ArviZ."""
