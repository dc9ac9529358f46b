# shellcheck shell=bash
# How pip finds packages on this host, made fit for the inside of a build. Sourced by build.sh.
#
# collect_pip_settings FOLDER [PIP_CONF]     fills FOLDER, which is bound to /mnt while the image is built; adds flags to `binds`
#
# Bound and not copied in, because an index's address may hold a password and images keep the definition they were built from.
# Local folders that the settings name are bound beside, and the settings say their names in there.

collect_pip_settings() {
    local folder=$1 named=${2:-${PIP_CONFIG_FILE:-}} name value
    mkdir -p "$folder/site/pip" "$folder/user/pip"
    # Where pip looks by itself, the general first.
    if [ -z "${2:-}" ] && [ "$named" != /dev/null ]; then
        local file
        for file in "${XDG_CONFIG_DIRS:-/etc/xdg}/pip/pip.conf" /etc/pip.conf; do
            [ -r "$file" ] && cp -- "$file" "$folder/site/pip/pip.conf"
        done
        for file in "${HOME:-/nonexistent}/.pip/pip.conf" "${XDG_CONFIG_HOME:-${HOME:-/nonexistent}/.config}/pip/pip.conf"; do
            [ -r "$file" ] && cp -- "$file" "$folder/user/pip/pip.conf"
        done
    fi
    {
        echo "export XDG_CONFIG_DIRS=/mnt/site XDG_CONFIG_HOME=/mnt/user"
        if [ -n "$named" ] && [ -r "$named" ]; then
            cat -- "$named" >"$folder/pip.conf"
            echo "export PIP_CONFIG_FILE=/mnt/pip.conf"
        fi
        # Those that say where packages come from; not those that say where on this host they go.
        for name in PIP_{INDEX_URL,EXTRA_INDEX_URL,FIND_LINKS,NO_INDEX,TRUSTED_HOST,CERT,CLIENT_CERT,PROXY,TIMEOUT,DEFAULT_TIMEOUT,RETRIES} \
            {http,https,no,all}_proxy {HTTP,HTTPS,NO,ALL}_PROXY {REQUESTS_CA_BUNDLE,SSL_CERT_FILE}; do
            value=${!name:-}
            [ -z "$value" ] || printf "export %s='%s'\n" "$name" "${value//\'/\'\\\'\'}"
        done
    } >"$folder/environ"
    binds+=(--bind "$folder:/mnt:ro")
    _bind_local_paths "$folder"
}

# Every file or folder of this host that the settings name: a folder is bound, a file copied.
_bind_local_paths() {
    local folder=$1 settings=() named path inside number=0
    mapfile -t settings < <(find "$folder" -type f)
    while IFS= read -r named; do
        path=${named#file://} path=${path%/}
        [[ $path == /mnt/* ]] || [ ! -e "$path" ] && continue
        number=$((number + 1)) inside=/mnt/$number
        if [ -f "$path" ]; then
            cp -- "$path" "$folder/$number"
        elif [[ $named != file://* ]]; then
            mkdir "$folder/$number"
            binds+=(--bind "$path:$inside:ro")
        else
            # An index's pages refer to files beside its folder.
            mkdir "$folder/$number"
            binds+=(--bind "$(dirname "$path"):$inside:ro")
            inside=$inside/$(basename "$path")
        fi
        # As a whole word: /opt/wheels is not the beginning of /opt/wheels-new.
        sed -i -E "s#(^|[^[:alnum:]_./-])${path//./\\.}/?([^[:alnum:]_./-]|\$)#\1$inside\2#g; s#file://${path//./\\.}/?([^[:alnum:]_./-]|\$)#file://$inside\1#g" \
            "${settings[@]}"
    done < <(grep -hoE "(file://)?/[^][:space:],'\"]+" "${settings[@]}" | sort -u)
}
