"""What the README's figures were measured with: `python -m benchmarks.NAME`, see README.md here."""
