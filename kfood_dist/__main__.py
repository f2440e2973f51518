from kfood_dist.cli import main

raise SystemExit(main())
