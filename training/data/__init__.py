"""Files of counts come in; blocks of cells, shards and whole files go out. Command lines of all stages start here."""
