"""Records as pages: notebooks and members as HTML, model cards; figures: their style, plots over seeds, views of a
search."""
