"""What is written out: report pages, vendored files, the files of a new paper."""
