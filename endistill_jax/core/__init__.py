"""Types that everything shares: batches, sites, settings, errors."""
