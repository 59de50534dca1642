// The form's settings of acceptance, made of acceptance.json: which policies there are, what each of them reads, and
// the guards. It knows fields and values, and nothing of requests.

/** "fly_entropy_threshold" of policy "fly" is "Entropy threshold". */
function labelOf(name, policy) {
  const short = name.startsWith(`${policy}_`) ? name.slice(policy.length + 1) : name;
  const words = short.replaceAll("_", " ");
  return words[0].toUpperCase() + words.slice(1);
}

function makeField(name, setting, policy) {
  const field = document.createElement("div");
  field.className = "field";
  const label = field.appendChild(document.createElement("label"));
  label.textContent = labelOf(name, policy);
  label.htmlFor = name;
  const input = field.appendChild(setting.choices ? makeSelect(setting.choices) : makeInput(setting));
  input.id = name;
  input.title = setting.help;
  input.dataset.setting = name;
  return field;
}

function makeSelect(choices) {
  const select = document.createElement("select");
  select.add(new Option("as built", ""));
  for (const choice of choices) select.add(new Option(choice, choice));
  return select;
}

function makeInput(setting) {
  const input = document.createElement("input");
  const isNumber = !setting.is_list && setting.kind !== "str";
  input.type = isNumber ? "number" : "text";
  // A help text ends in what holds where nothing is given: "... [0.3]".
  input.placeholder = /\[(.*)\]$/.exec(setting.help)?.[1] ?? "as built";
  if (isNumber) {
    input.min = setting.least;
    if (setting.most !== null) input.max = setting.most;
    input.step = setting.kind === "int" ? 1 : "any";
  }
  return input;
}

function valueOf(text, setting) {
  const one = (item) => (setting.kind === "str" ? item : Number(item));
  return setting.is_list ? text.split(",").map((item) => item.trim()).filter(Boolean).map(one) : one(text);
}

export class AcceptanceForm {
  /** `known` is acceptance.json; the elements are the page's. */
  constructor(known, { select, group, legend, fields, guards, guardFields }) {
    this._known = known;
    this._select = select;
    this._group = group;
    this._legend = legend;
    this._fields = fields;
    this._guards = guards;
    this._guardFields = guardFields;
    select.add(new Option("server default", ""));
    for (const name of Object.keys(known.policies)) select.add(new Option(name, name));
    guardFields.append(...known.guards.map((name) => makeField(name, known.settings[name], "")));
    select.addEventListener("change", () => this._follow());
    this._follow();
  }

  /** The name of the chosen policy; "" for the server's own. */
  get policy() {
    return this._select.value;
  }

  /** The fields of a request: the policy, its settings and guards, where they are given. */
  values() {
    const values = this.policy ? { acceptance: this.policy } : {};
    const asked = [this._fields, ...(this.policy === "exact" ? [] : [this._guardFields])];
    for (const input of asked.flatMap((place) => [...place.querySelectorAll("[data-setting]")])) {
      const name = input.dataset.setting;
      if (input.value.trim()) values[name] = valueOf(input.value, this._known.settings[name]);
    }
    return values;
  }

  _follow() {
    const settings = this._known.policies[this.policy] ?? [];
    this._group.hidden = !settings.length;
    this._legend.textContent = `Settings of ${this.policy}`;
    this._fields.replaceChildren(...settings.map((name) => makeField(name, this._known.settings[name], this.policy)));
    this._guards.hidden = this.policy === "exact";
  }
}
