# Sourced with a script's words: if they ask for help, prints the script's first comment and ends it.
for word in "$@"; do
  case "$word" in
    -h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --) break ;;
  esac
done
