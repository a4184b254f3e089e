"""What explanations and predictions are measured by; each figure is a pure function with its definition and source."""
