"""How the networks of a policy are run on a device: as written, or recorded once for every size of batch."""
