"""Files of counts come in; a folder of shards goes out. Only ``dcm-convert`` needs what is here."""
