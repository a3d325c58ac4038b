"""Records as pages: executed notebooks and members as HTML, the style of figures, model cards."""
