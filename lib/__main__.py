from lib.run.cli import main

raise SystemExit(main())
