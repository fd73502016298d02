"""What every folder needs: files written whole, tables, plots. Imports no torch."""
