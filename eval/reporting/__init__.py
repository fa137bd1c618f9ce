"""From scores to a report: paired comparisons with their statistics, tables, figures, pages."""
