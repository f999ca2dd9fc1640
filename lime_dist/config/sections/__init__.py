"""The sections of a configuration, one file per room of the house that reads them."""
