"""`mentorch report RUN`: which labels are most likely wrong, as a table and as a page."""
