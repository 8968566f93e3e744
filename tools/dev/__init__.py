"""For developers: structure of the code, tables of the documents."""
