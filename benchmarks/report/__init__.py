"""How results are shown: the results file, tables, documents, pictures, agreement of two runs."""
