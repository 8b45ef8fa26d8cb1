"""WHERE weights come from and go to: lazy reading, names on disk against module names, sharded atomic writing."""
