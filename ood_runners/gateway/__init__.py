"""What the public service does between a request and its answer; imports neither torch nor scikit-learn."""
