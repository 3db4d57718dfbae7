"""From runs to paper: tables, figures and pages made from result files."""
