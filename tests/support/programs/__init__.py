"""Programs that tests run by their paths, with arguments."""
