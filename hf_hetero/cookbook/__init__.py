"""The room of the recipes that come with the package: found, shown, copied, checked."""
