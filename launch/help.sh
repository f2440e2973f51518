# Source this with a script's arguments. If they ask for help, it prints the script's first comment and exits.
for word in "$@"; do
  case "$word" in
    -h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) break ;;
  esac
done
