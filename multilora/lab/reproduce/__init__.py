"""Papers' claims measured on the embedded models: one file per experiment, `bench` under them, `page` above."""
