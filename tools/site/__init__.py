"""Builds the site: Sphinx reads the project's Markdown as it stands, and this package adds what Markdown cannot say."""
