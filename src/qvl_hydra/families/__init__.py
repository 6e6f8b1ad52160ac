"""What a model family is: one row of the table, one module with the stages that data meets."""
