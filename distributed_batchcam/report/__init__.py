"""What a run looks like: figures as PNG files, and the report as one HTML file."""
